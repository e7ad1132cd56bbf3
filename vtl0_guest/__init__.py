"""The process that runs the vCPUs of VTL0: mechanism alone, no decisions."""
