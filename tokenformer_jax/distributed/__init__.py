"""Devices and processes: the mesh, the table from logical axes to mesh axes, and what compiled programs send."""
