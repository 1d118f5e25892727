"""Images to training views: decoding, patch selection, captions, manifest, seeded views."""
