"""The inspector: pages over a folder of results, and a generator to steer by hand. `pysteer inspect` serves it."""
