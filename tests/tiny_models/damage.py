"""What a failing disk does to a file."""


def overwrite(checkpoint, start=None, size=4096):
    """Zeros in the middle of a checkpoint's weights, or from `start` on; its size stays."""
    weights = checkpoint / "state.weights.h5"
    content = bytearray(weights.read_bytes())
    start = len(content) // 2 if start is None else start
    size = min(size, len(content) - start)
    assert any(content[start : start + size]), "there is something to damage"
    content[start : start + size] = bytes(size)
    weights.write_bytes(content)
