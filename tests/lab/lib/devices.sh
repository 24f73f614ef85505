# Sourced by `virtio` and `crash`, whose variables it uses (`work`, `nonce`, `pairs`): the devices, and how a machine gets them.
# shellcheck shell=bash disable=SC2154,SC2034

mac=52:54:00:ba:00:01

# serve NAME...: sets `served` to barkeep's devices.
serve() {
  local name
  served=()
  for name; do
    served+=("$name" "$(barkeep_device "$name")")
  done
}

# barkeep_device NAME: the argument of --device.
barkeep_device() {
  case $1 in
    disk) echo "virtio-blk,path=$work/disk,serial=${nonce:0:20},queues=2,queue-size=64" ;;
    # As many entries as the guest has writers.
    busy) echo "virtio-blk,path=$work/disk,queues=1,queue-size=32" ;;
    read-only) echo "virtio-blk,path=$work/read-only,readonly=on,logical-block-size=4096" ;;
    net) echo "virtio-net,tap=lab0,mac=$mac,queues=$pairs" ;;
    rng) echo "virtio-rng" ;;
    console) echo "virtio-console,socket=$work/terminal.sock" ;;
    qcow2 | nbd) echo "vhost-user,type=blk,socket=$work/$1-daemon.sock,queues=2" ;;
    # For `crash`: a disk beside the one that something happens to, and one whose image has no room.
    beside) echo "virtio-blk,path=$work/beside" ;;
    cramped) echo "virtio-blk,path=$room/image,queues=2" ;;
    edu) echo edu ;;
    doorbell) echo "ivshmem,size=4M,vectors=4" ;;
    ivshmem) echo "ivshmem,size=4M,path=$work/shared" ;;
    fs) echo "vhost-user,type=fs,socket=$work/fs-daemon.sock,tag=lab" ;;
  esac
}

# of_qemu_itself NAME...: sets `functions` to QEMU's own devices.
of_qemu_itself() {
  local name
  functions=()
  for name; do
    case $name in
      disk | busy)
        functions+=(-blockdev "driver=file,node-name=disk,filename=$work/disk,discard=unmap")
        [ "$name" = busy ] || functions+=(
          -device "virtio-blk-pci-non-transitional,drive=disk,serial=${nonce:0:20},num-queues=2,queue-size=64"
        )
        [ "$name" = disk ] || functions+=(
          -device "virtio-blk-pci-non-transitional,drive=disk,num-queues=1,queue-size=32"
        )
        ;;
      read-only)
        functions+=(
          -blockdev "driver=file,node-name=read-only,filename=$work/read-only,read-only=on"
          -device "virtio-blk-pci-non-transitional,drive=read-only,logical_block_size=4096,physical_block_size=4096"
        )
        ;;
      net)
        functions+=(
          -netdev "tap,id=net,ifname=lab0,script=no,downscript=no,queues=$pairs"
          -device "virtio-net-pci-non-transitional,netdev=net,mac=$mac,mq=on,vectors=$((2 * pairs + 2))"
        )
        ;;
      rng) functions+=(-device virtio-rng-pci-non-transitional) ;;
      console)
        functions+=(
          -chardev "socket,id=console,path=$work/terminal.sock,server=on,wait=off"
          -device virtio-serial-pci-non-transitional -device virtconsole,chardev=console
        )
        ;;
    esac
  done
}

# of_daemons SUFFIX NAME...: sets `functions` to QEMU's devices for vhost-user daemons, whose sockets are
# called NAME and SUFFIX.
of_daemons() {
  local name again suffix=$1
  shift
  functions=()
  for name; do
    again=
    # Those that are killed.
    [[ $name != qcow2 && $name != nbd ]] || again=,reconnect-ms=100
    functions+=(-chardev "socket,id=$name,path=$work/$name$suffix.sock$again")
    case $name in
      # No message tells QEMU how large a queue may be.
      disk | qcow2 | nbd)
        functions+=(-device "vhost-user-blk-pci-non-transitional,chardev=$name,num-queues=2,queue-size=64")
        ;;
      read-only) functions+=(-device "vhost-user-blk-pci-non-transitional,chardev=$name,num-queues=1") ;;
      net)
        functions+=(
          -netdev "vhost-user,id=net,chardev=net,queues=$pairs"
          -device "virtio-net-pci-non-transitional,netdev=net,mac=$mac,mq=on,vectors=$((2 * pairs + 2))"
        )
        ;;
      rng) functions+=(-device vhost-user-rng-pci,chardev=rng) ;;
      fs) functions+=(-device vhost-user-fs-pci,chardev=fs,tag=lab) ;;
    esac
  done
}
