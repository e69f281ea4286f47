//! The PXE service: dnsmasq for DHCP or proxy-DHCP and TFTP, HTTP for kernel, initramfs and a boot script per node.
