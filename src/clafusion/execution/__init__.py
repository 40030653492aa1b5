"""Run modules and exported graphs with weights from anywhere."""
