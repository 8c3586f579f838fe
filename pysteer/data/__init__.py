"""Data for experiments with concepts: what ships of it, files of tasks, downloads with a checksum."""
