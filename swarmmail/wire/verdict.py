"""The verdict on a pair of hosts, from what was seen. Pure."""
