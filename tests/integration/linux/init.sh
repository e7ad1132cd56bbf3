#!/bin/busybox sh
# What the kernel starts. Kernel parameters in capitals are variables here: LOOP, the iterations of a shell loop, and
# THEN, what follows: reboot (the default), poweroff, or shell (commands from the console, until its end).
PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

uptime_now() { read -r now _ < /proc/uptime; }

uptime_now
echo "init: started at $now with $(nproc) processors"
count=0
while [ "$count" -lt "${LOOP:-10000}" ]; do count=$((count + 1)); done
before=$now
uptime_now
echo "init: counted to $count from $before to $now"
case "${THEN:-reboot}" in
shell)
  stty -echo
  echo "init: shell"
  while read -r line; do
    eval "$line"
    echo "init: status $?"
  done
  ;;
poweroff) poweroff -f ;;
esac
reboot -f
