"""From files to batches: documents (corpus), token files (shards), packing and order (batches)."""
