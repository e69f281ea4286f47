//! Raw packets on one network interface (AF_PACKET), for talking DHCP before the interface has an address, and UDP
//! sockets that are tied to an interface. Links, addresses and routes are set over netlink, which needs no `unsafe` and
//! stands in the agent.

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::ffi::OsString;
use std::io;
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// The broadcast address of Ethernet.
pub const BROADCAST: [u8; 6] = [0xff; 6];

/// A socket for the IPv4 packets of one interface, without their Ethernet headers.
pub struct PacketSocket {
    fd: OwnedFd,
    ifindex: i32,
}

/// A packet that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Its length in the buffer.
    pub len: usize,
    /// Whether the checksums inside are there to be checked. A packet from this very host (or its hypervisor) may come
    /// with the checksum left for hardware that it never passed through.
    pub checksum_ready: bool,
}

#[allow(clippy::cast_possible_truncation)] // 0x0800
fn ethertype_ipv4() -> u16 {
    (libc::ETH_P_IP as u16).to_be()
}

impl PacketSocket {
    /// Opens a socket on the interface with index `ifindex`.
    ///
    /// # Errors
    /// When the kernel refuses: not root, no such interface, no AF_PACKET.
    #[allow(unsafe_code)]
    pub fn open(ifindex: u32) -> io::Result<Self> {
        let ifindex = i32::try_from(ifindex).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // Protocol 0 receives nothing: no packet of another interface can slip in before bind names this one.
        // SAFETY: socket has no memory arguments; a returned descriptor is new and owned by nobody else.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let one: libc::c_int = 1;
        // SAFETY: the option value points to an int that lives through the call, and its size is given.
        let status = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_AUXDATA,
                (&raw const one).cast(),
                socklen::<libc::c_int>(),
            )
        };
        if status < 0 {
            return Err(io::Error::last_os_error());
        }
        let address = link_address(ifindex, [0; 6]);
        // SAFETY: the address is a fully initialised sockaddr_ll that lives through the call, and its size is given.
        let status = unsafe {
            libc::bind(fd.as_raw_fd(), (&raw const address).cast(), socklen::<libc::sockaddr_ll>())
        };
        if status < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd, ifindex })
    }

    /// Sends `packet`, which begins with its IPv4 header, to the Ethernet address `to`.
    ///
    /// # Errors
    /// When the kernel refuses (link down) or takes only part of it.
    #[allow(unsafe_code)]
    pub fn send(&self, packet: &[u8], to: [u8; 6]) -> io::Result<()> {
        let address = link_address(self.ifindex, to);
        // SAFETY: the pointers and lengths describe `packet` and a fully initialised sockaddr_ll, both alive.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                libc::MSG_NOSIGNAL,
                (&raw const address).cast(),
                socklen::<libc::sockaddr_ll>(),
            )
        };
        match usize::try_from(sent) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(n) if n == packet.len() => Ok(()),
            Ok(n) => Err(io::Error::other(format!("only {n} of {} bytes were sent", packet.len()))),
        }
    }

    /// Receives the next packet into `buffer` (what does not fit is cut off), or none when `limit` has passed.
    ///
    /// # Errors
    /// When the kernel refuses: the interface went down or away.
    #[allow(unsafe_code)]
    pub fn receive(&self, buffer: &mut [u8], limit: Duration) -> io::Result<Option<Received>> {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], limit) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        // A u64 array, because control messages must be aligned like their header.
        let mut control = [0u64; 16];
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: msghdr is plain data for which zero is valid in every field.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = std::mem::size_of_val(&control) as _;
        // SAFETY: the message describes `buffer` and `control`, both alive and writable for the given lengths.
        let got = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let Ok(len) = usize::try_from(got) else {
            let e = io::Error::last_os_error();
            return match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(e),
            };
        };
        let mut checksum_ready = true;
        // SAFETY: the kernel filled `message` and `control`; the CMSG macros stay within msg_controllen; the payload is
        // read unaligned and only when its length says that a whole tpacket_auxdata is there.
        unsafe {
            let mut header = libc::CMSG_FIRSTHDR(&raw const message);
            while !header.is_null() {
                let whole = libc::CMSG_LEN(socklen::<libc::tpacket_auxdata>()) as usize;
                if (*header).cmsg_level == libc::SOL_PACKET
                    && (*header).cmsg_type == libc::PACKET_AUXDATA
                    && (*header).cmsg_len as usize >= whole
                {
                    let data = libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned();
                    checksum_ready = data.tp_status & libc::TP_STATUS_CSUMNOTREADY == 0;
                }
                header = libc::CMSG_NXTHDR(&raw const message, header);
            }
        }
        Ok(Some(Received { len: len.min(buffer.len()), checksum_ready }))
    }
}

#[allow(clippy::cast_possible_truncation)] // sizes of C structures of a few bytes
fn socklen<T>() -> libc::socklen_t {
    std::mem::size_of::<T>() as libc::socklen_t
}

#[allow(clippy::cast_possible_truncation)] // AF_PACKET is 17
fn link_address(ifindex: i32, mac: [u8; 6]) -> libc::sockaddr_ll {
    let mut address = [0; 8];
    address[..6].copy_from_slice(&mac);
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ethertype_ipv4(),
        sll_ifindex: ifindex,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: address,
    }
}

/// A UDP socket on `local` that sends and receives on `interface` only, and may broadcast.
///
/// # Errors
/// When the kernel refuses: not root, the port is taken, no such interface.
pub fn udp_on(interface: &str, local: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(local)?;
    nix::sys::socket::setsockopt(
        &socket,
        nix::sys::socket::sockopt::BindToDevice,
        &OsString::from(interface),
    )?;
    socket.set_broadcast(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn packets_pass_over_loopback() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: packet sockets need root");
            return;
        }
        // Loopback has index 1 in every network namespace.
        let socket = PacketSocket::open(1).unwrap();
        let target = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let sender = udp_on("lo", SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        sender.send_to(b"ka-packet-test", target.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 2048];
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        loop {
            assert!(std::time::Instant::now() < deadline, "the packet was not seen");
            let Some(got) = socket.receive(&mut buffer, Duration::from_millis(100)).unwrap() else {
                continue;
            };
            if buffer[..got.len].ends_with(b"ka-packet-test") {
                assert_eq!(buffer[0], 0x45, "it begins with its IPv4 header");
                assert!(
                    !got.checksum_ready,
                    "loopback leaves the UDP checksum to hardware that is not there"
                );
                break;
            }
        }
    }

    #[test]
    fn a_missing_interface_is_an_error() {
        assert!(PacketSocket::open(999_999).is_err());
        assert!(udp_on("no-such-if", SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).is_err());
    }
}
