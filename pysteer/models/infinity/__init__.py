"""The Infinity image generator (VAR with bitwise tokens): a port that runs on CPU and GPU and loads official weights."""
