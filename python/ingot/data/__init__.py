"""From files to batches.

Text to read: ``corpus`` documents, ``shards`` token files, ``batches`` packing and order. Rows to align with: ``files`` opening, ``rows``
what each row is, ``keys`` what prompts and rows are known by, ``judgements`` which of them count, ``split`` held-out prompts, ``imports``
other formats, ``chat`` dialogues as ids, ``examples`` packs of encoded rows.
"""
