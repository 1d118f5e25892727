"""The embedded benchmark: scenes, a camera, small generators and a CLIP pre-trained on the scenes."""
