"""Build a cache with a pause after each shard, so that test_build.py can kill the process between two shards."""

import sys
import time
from pathlib import Path

from dwakd.cache.store import Cache
from tests.cache.builders import trainer

if __name__ == "__main__":
    teacher, cache = map(Path, sys.argv[1:])
    write = Cache.write_shard

    def slow(self, shard, hidden):
        write(self, shard, hidden)
        time.sleep(0.3)

    Cache.write_shard = slow  # type: ignore[method-assign]
    trainer(cache.parent / "killed", teacher, cache=cache)
