"""Content keys: chained, salted, and the same in every process."""

from __future__ import annotations

import subprocess
import sys

from xdeepserve.rtc.block_hash import BlockHashChain


def keys(token_ids: list[int], *, salt: str = "", block_size: int = 4) -> list[bytes]:
    chain = BlockHashChain(cache_salt=salt, block_size=block_size)
    chain.extend(token_ids, len(token_ids) // block_size)
    return [key.digest for key in chain.keys]


def test_a_key_covers_everything_before_it() -> None:
    first, second = keys([1, 2, 3, 4, 5, 6, 7, 8])
    other_first, other_second = keys([9, 2, 3, 4, 5, 6, 7, 8])
    assert first != other_first
    assert second != other_second
    assert keys([1, 2, 3, 4, 9, 9, 9, 9])[0] == first


def test_salt_and_block_size_separate_keys() -> None:
    ids = list(range(8))
    assert not set(keys(ids)) & set(keys(ids, salt="tenant-a"))
    assert not set(keys(ids)) & set(keys(ids, block_size=8))


def test_extending_in_pieces_gives_the_same_keys() -> None:
    ids = list(range(12))
    chain = BlockHashChain(cache_salt="s", block_size=4)
    chain.extend(ids[:5], 1)
    chain.extend(ids, 3)
    chain.extend(ids, 2)
    assert [key.digest for key in chain.keys] == keys(ids, salt="s")


def test_keys_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from xdeepserve.rtc.block_hash import BlockHashChain as C\n"
        "c = C(cache_salt='s', block_size=2); c.extend([7, 300000], 1)\n"
        "import sys; sys.stdout.write(c.keys[0].digest.hex())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {keys([7, 300000], salt="s", block_size=2)[0].hex()}
