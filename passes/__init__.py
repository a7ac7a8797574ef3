"""Graph passes: ``onnx_ir.passes`` passes, Model -> Model, without paths and without printing."""
