"""Running a model on a runtime and a device, behind one small protocol."""
