"""Put and get through a store of its own.

mooncake store --nodes 2 --cluster demo &
python examples/store_put_get.py /tmp/mooncake-$(id -u)-demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mooncake.store.api import PutResult, Store, named_key


def main(run_dir: str) -> None:
    """run_dir: as `mooncake store` prints it; the cluster's token is in its config.json."""
    file = Path(run_dir) / "config.json"
    if not file.exists():
        sys.exit(
            f"{file} is not there: start `mooncake store --nodes 2 --cluster demo`, and give the folder of its config.json"
        )
    config = json.loads(file.read_text())
    with Store.connect(
        directory=[f"unix:{run_dir}/directory.sock"], cluster=config["cluster"], token=config["token"]
    ) as store:
        key, data = named_key("hello"), b"bytes of any kind" * 1000
        result = store.put(key, data, replicas=2)
        print("put", result.name)
        assert result in (PutResult.STORED, PutResult.EXISTS)
        print("replicas", store.replicate([key], 2), [replica.node for replica in store.locate([key])[0]])
        assert store.get(key) == data

        buffer = bytearray(len(data))
        print("get_into", store.get_into(key, buffer), "bytes")
        with store.view(key) as view:  # no copy at all: the object itself, leased
            if isinstance(view, memoryview):
                print("view", view.nbytes, "bytes, first", bytes(view[:5]))

        with store.writing(named_key("layer by layer"), 4 * 1024) as session:
            if not isinstance(session, PutResult):
                for layer in range(4):
                    session.write(layer * 1024, bytes([layer]) * 1024)
                print("session", session.commit().name)

        print("a key that nobody put:", store.get(named_key("nothing")))  # UNKNOWN while the directory is young
        print("remove", store.remove_batch([key, named_key("layer by layer")]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
