"""Real pictures, for the study on photographs: where they come from, laying them out, captions blind to the label."""
