//! Network links, addresses, routes and raw sockets.
