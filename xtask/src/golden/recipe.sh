# Makes the lab's golden machine: a Debian tree with a generic kernel, both kinds of GRUB, and some files that are hard
# to copy. Runs in mount and PID namespaces of its own, so that nothing is left behind when it is killed.
# $1: the folder to fill (empty)   $2: address of the Debian archive
# Environment: KA_SUITE KA_PACKAGES KA_MENU (yes, no) KA_ROOT_UUID KA_ESP_UUID KA_SWAP_UUID KA_PASSWORD KA_HOSTNAME
set -euo pipefail
tree=$1
mirror=$2
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

echo "## debootstrap"
debootstrap --variant=minbase --merged-usr "$KA_SUITE" "$tree" "$mirror"

# Documentation, and drivers that neither a server room nor the lab has, stay out: half the size, half the time.
cat > "$tree/etc/dpkg/dpkg.cfg.d/lab" <<'X'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/lib/modules/*/kernel/sound/*
path-exclude=/lib/modules/*/kernel/drivers/gpu/*
path-exclude=/lib/modules/*/kernel/drivers/media/*
path-exclude=/lib/modules/*/kernel/drivers/staging/*
path-exclude=/lib/modules/*/kernel/drivers/iio/*
path-exclude=/lib/modules/*/kernel/drivers/isdn/*
path-exclude=/lib/modules/*/kernel/drivers/net/wireless/*
path-exclude=/lib/modules/*/kernel/net/wireless/*
path-exclude=/lib/modules/*/kernel/net/mac80211/*
path-exclude=/usr/lib/modules/*/kernel/sound/*
path-exclude=/usr/lib/modules/*/kernel/drivers/gpu/*
path-exclude=/usr/lib/modules/*/kernel/drivers/media/*
path-exclude=/usr/lib/modules/*/kernel/drivers/staging/*
path-exclude=/usr/lib/modules/*/kernel/drivers/iio/*
path-exclude=/usr/lib/modules/*/kernel/drivers/isdn/*
path-exclude=/usr/lib/modules/*/kernel/drivers/net/wireless/*
path-exclude=/usr/lib/modules/*/kernel/net/wireless/*
path-exclude=/usr/lib/modules/*/kernel/net/mac80211/*
X
# A BIOS reads an IDE disk word by word, which takes minutes for Debian's usual 30 MB when it is emulated: the initramfs
# holds the disk drivers of the lab's machines and no more.
mkdir -p "$tree/etc/initramfs-tools/conf.d" "$tree/usr/share/initramfs-tools/modules.d"
# And one that is built anew on an emulated machine is compressed quickly.
printf 'MODULES=list\nCOMPRESSLEVEL=1\n' > "$tree/etc/initramfs-tools/conf.d/lab"
printf '%s\n' ext4 xfs btrfs crc32c_generic ata_piix ata_generic ahci nvme virtio_pci virtio_blk virtio_scsi sd_mod \
  > "$tree/usr/share/initramfs-tools/modules.d/lab"
printf '#!/bin/sh\nexit 101\n' > "$tree/usr/sbin/policy-rc.d"
chmod 755 "$tree/usr/sbin/policy-rc.d"
cp /etc/resolv.conf "$tree/etc/resolv.conf"
# No apt of the host's is used here, so its proxy and the like must be handed on.
apt-config dump | grep -E '^Acquire::(http|https|Check|Retries)' > "$tree/etc/apt/apt.conf.d/00lab" || true
mount -t proc proc "$tree/proc"
mount -t sysfs -o ro sysfs "$tree/sys"
mount -t tmpfs -o mode=755 tmpfs "$tree/run"
mount -t tmpfs -o mode=755 tmpfs "$tree/dev"
for node in null zero full random urandom tty; do
  touch "$tree/dev/$node"
  mount --bind "/dev/$node" "$tree/dev/$node"
done
mkdir "$tree/dev/shm" "$tree/dev/pts"
ln -s /proc/self/fd "$tree/dev/fd"

echo "## packages"
in_tree() { chroot "$tree" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive HOME=/root "$@"; }
echo "grub-pc grub-pc/install_devices_empty boolean true" | in_tree debconf-set-selections
in_tree apt-get -o APT::Sandbox::User=root -o Acquire::Languages=none update
in_tree apt-get -o APT::Sandbox::User=root install -y --no-install-recommends \
  zstd linux-image-amd64 initramfs-tools grub-pc grub-efi-amd64-bin efibootmgr \
  systemd-sysv udev dbus kmod iproute2 openssh-server \
  e2fsprogs dosfstools xfsprogs btrfs-progs fdisk acl attr libcap2-bin \
  rsync cpio busybox-static dnsmasq-base ipxe $KA_PACKAGES

echo "## configuration"
echo "$KA_HOSTNAME" > "$tree/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\t%s\n::1\tlocalhost\n' "$KA_HOSTNAME" > "$tree/etc/hosts"
echo "root:$KA_PASSWORD" | in_tree chpasswd
cat > "$tree/etc/fstab" <<X
UUID=$KA_ROOT_UUID  /          ext4  errors=remount-ro  0 1
UUID=$KA_ESP_UUID   /boot/efi  vfat  umask=0077         0 2
UUID=$KA_SWAP_UUID  none       swap  sw                 0 0
X
mkdir "$tree/boot/efi"
sed -i -e 's/^GRUB_TIMEOUT=.*/GRUB_TIMEOUT=1/' -e 's/^GRUB_CMDLINE_LINUX=.*/GRUB_CMDLINE_LINUX="console=ttyS0"/' \
  -e 's/^GRUB_CMDLINE_LINUX_DEFAULT=.*/GRUB_CMDLINE_LINUX_DEFAULT="loglevel=5 mitigations=off tsc=reliable"/' "$tree/etc/default/grub"
echo 'GRUB_TERMINAL="console serial"' >> "$tree/etc/default/grub"
mkdir -p "$tree/etc/systemd/network"
printf '[Match]\nName=en* eth*\n\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\n' > "$tree/etc/systemd/network/50-dhcp.network"
in_tree systemctl enable systemd-networkd.service
in_tree systemctl disable systemd-networkd-wait-online.service
# An emulated machine on a busy host is slow: systemd must not give a serial port up after 90 s, and timers would only
# make it slower.
mkdir -p "$tree/etc/systemd/system.conf.d"
printf '[Manager]\nDefaultTimeoutStartSec=10min\nDefaultDeviceTimeoutSec=10min\n' > "$tree/etc/systemd/system.conf.d/lab.conf"
in_tree systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer dpkg-db-backup.timer
# A golden machine has lived: it has an identity, which no clone may keep.
in_tree systemd-machine-id-setup

if [ "$KA_MENU" = yes ]; then
  # As update-grub writes it, which needs the disks of a real machine.
  kernel=$(basename "$tree"/usr/lib/modules/*)
  cat > "$tree/boot/grub/grub.cfg" <<X
insmod part_msdos
insmod part_gpt
insmod ext2
search --no-floppy --fs-uuid --set=root $KA_ROOT_UUID
serial
terminal_input console serial
terminal_output console serial
set timeout=1
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux --class gnu --class os {
	insmod gzio
	search --no-floppy --fs-uuid --set=root $KA_ROOT_UUID
	linux	/boot/vmlinuz-$kernel root=UUID=$KA_ROOT_UUID ro console=ttyS0 loglevel=5 mitigations=off tsc=reliable
	initrd	/boot/initrd.img-$kernel
}
X
fi

echo "## hard cases"
hard=$tree/srv/hard-cases
mkdir -p "$hard/a" "$hard/b"
cp "$tree/bin/true" "$hard/capable"
setcap cap_net_bind_service,cap_net_raw=ep "$hard/capable"
echo acl > "$hard/acl"
setfacl -m g:10:rw,u:4000:r "$hard/acl"
setfacl -d -m g:10:rwx "$hard/a"
echo xattr > "$hard/xattr"
setfattr -n user.lines -v 0x610a620a00ff "$hard/xattr"
setfattr -n trusted.ka -v 'for root only' "$hard/xattr"
truncate -s 64M "$hard/sparse"
printf 'middle' | dd of="$hard/sparse" bs=1 seek=33554432 conv=notrunc status=none
truncate -s 1G "$hard/all-hole"
echo linked > "$hard/a/one"
ln "$hard/a/one" "$hard/b/two"
ln "$hard/a/one" "$hard/three"
ln -s ../nowhere "$hard/dangling"
mkfifo -m 640 "$hard/fifo"
mknod -m 600 "$hard/null" c 1 3
mknod -m 660 "$hard/block" b 7 250
echo odd > "$hard"/$'not utf-8 \xff\xfe, and a\nnewline'
echo long > "$hard/$(printf 'n%.0s' $(seq 255))"
echo old > "$hard/before-1970"
touch -d '1955-11-05T06:15:00.123456789Z' "$hard/before-1970"
echo big > "$hard/uid"
chown 4000000000:4000000001 "$hard/uid"
echo s > "$hard/suid"
chmod 6755 "$hard/suid"
: > "$hard/empty"

echo "## tidying"
in_tree apt-get clean
rm -rf "$tree"/var/lib/apt/lists/* "$tree"/var/log/apt "$tree"/var/log/*.log "$tree"/etc/apt/apt.conf.d/00lab
rm -rf "$tree"/usr/share/locale/* "$tree"/usr/share/man/* "$tree"/usr/share/info/*
rm -f "$tree/usr/sbin/policy-rc.d" "$tree"/var/cache/debconf/*-old "$tree"/var/lib/dpkg/*-old "$tree"/initrd.img.old "$tree"/vmlinuz.old
: > "$tree/etc/resolv.conf"
umount "$tree"/dev/{null,zero,full,random,urandom,tty} "$tree/dev" "$tree/run" "$tree/sys" "$tree/proc"
