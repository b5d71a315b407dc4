"""Pictures that have been encoded: further instructions about one skip both vision encoders."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from PIL import Image

from instructsam.models.stages import EncodedImages


def picture_key(image: Image.Image) -> bytes:
    """The same for pictures of the same size and pixels only."""
    digest = hashlib.blake2b(f"{image.mode} {image.width} {image.height} ".encode(), digest_size=20)
    digest.update(image.tobytes())
    return digest.digest()


class ImageCache:
    """Keeps what was last encoded, on the model's device; may be used by several threads.

    Args:
        size: number of pictures; 0 keeps none. At full size one of 512 x 600 takes 60 MiB in
            bfloat16, one of 1600 x 1200 85 MiB.

    Attributes:
        hits, misses: pictures that were found and those that had to be encoded.

    Raises:
        ValueError: a negative size.
    """

    def __init__(self, size: int):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"cached_images={size!r}: must be a number of pictures, 0 for none")
        self.size, self.hits, self.misses = size, 0, 0
        self._known: OrderedDict[bytes, EncodedImages] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget all pictures, which frees their memory."""
        with self._lock:
            self._known.clear()

    def encode(
        self, images: Sequence[Image.Image], encode: Callable[[list[Image.Image]], EncodedImages]
    ) -> tuple[EncodedImages, list[int], list[bool]]:
        """Encode pictures, those that are new in one batch.

        Args:
            images: in RGB; the same one may come several times.
            encode: runs the encoders.

        Returns:
            The different pictures among them; for each given one its place among those, and whether it was known.
        """
        objects = {id(image): image for image in images}  # one that comes several times is hashed once
        key_of = {number: picture_key(image) for number, image in objects.items()}
        keys = [key_of[id(image)] for image in images]
        by_key = dict(zip(keys, images, strict=True))
        with self._lock:
            found = {key: self._known[key] for key in by_key if key in self._known}
            for key in found:
                self._known.move_to_end(key)
            new = [key for key in by_key if key not in found]
            self.hits, self.misses = self.hits + len(found), self.misses + len(new)
        parts = list(found.values())
        if new:
            parts.append(encode([by_key[key] for key in new]))
            kept = range(max(0, len(new) - self.size), len(new))
            with self._lock:
                self._known.update((new[k], parts[-1].one(k)) for k in kept)
                while len(self._known) > self.size:
                    self._known.popitem(last=False)
        place = {key: k for k, key in enumerate([*found, *new])}
        return EncodedImages.join(parts), [place[key] for key in keys], [key in found for key in keys]
