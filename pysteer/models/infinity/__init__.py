"""The Infinity image generator (VAR with bitwise tokens): runs on CPU and GPU, loads official weights."""
