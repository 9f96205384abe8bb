"""Creates tar files like those of ImageNet."""

import io
import tarfile


def tar(files: dict[str, bytes]) -> bytes:
    """An uncompressed tar archive of the given files (name -> content)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:") as made:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            made.addfile(entry, io.BytesIO(data))
    return content.getvalue()
