"""Other tools, each run in a process of its own: an fp32 ONNX file and calibration inputs → an int8 artifact."""
