"""Real pictures, for the study on photographs: where they come from, and laying them out."""
