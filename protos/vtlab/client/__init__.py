"""The SDK: what attack scripts, tests, notebooks and the command line use to drive a laboratory.

    with connect() as lab, lab.create("guest.elf", command_line="heki=1") as machine:
        machine.start()
        machine.wait_serial("ready")

Failures are the exceptions of vtlab.errors. Requests and answers are the messages of vtlab.v1 wherever they are data.
"""

from vtlab.client.lab import Lab, connect
from vtlab.client.machine import Machine
from vtlab.client.policy import Policy
from vtlab.client.runtime import Addresses
from vtlab.client.serial import SerialReader

__all__ = ["Addresses", "Lab", "Machine", "Policy", "SerialReader", "connect"]
