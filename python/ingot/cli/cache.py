"""``ingot cache``."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """List or clear the tokenized data that are kept between runs."""

    folder: str = "runs/.cache"
    """The cache folder; a run keeps it beside its output folder."""
    clear: bool = False
    """Delete them; they are made again when needed."""

    def run(self) -> int:
        """List, or clear."""
        from ingot.data.cache import cached_files, clear_cache

        if self.clear:
            count, freed = clear_cache(self.folder)
            print(f"deleted {count} files of tokenized data, {freed / 1e6:.1f} MB")
            return 0
        files = cached_files(self.folder)
        for path in files:
            print(f"{path.stat().st_size / 1e6:10.1f} MB  {path}")
        print(f"{len(files)} files of tokenized data in {self.folder}")
        return 0
