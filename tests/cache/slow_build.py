"""A build that dawdles between shards, to be killed by test_integrity.py."""

import sys
import time
from pathlib import Path

from dwakd.cache.store import Cache
from tests.cache.builders import trainer

if __name__ == "__main__":
    teacher, cache = map(Path, sys.argv[1:])
    write = Cache.write_shard

    def dawdle(self, shard, hidden):
        write(self, shard, hidden)
        time.sleep(0.3)

    Cache.write_shard = dawdle  # type: ignore[method-assign]
    trainer(cache.parent / "killed", teacher, cache=cache)
