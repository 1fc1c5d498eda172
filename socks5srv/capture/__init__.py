"""What crosses the sockets, as a pcap file: sockets.py notes it, pcap.py writes it."""
