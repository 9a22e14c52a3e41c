"""CPU kernels in plain C++, built on first need (see :mod:`qcompile.kernels.cpu.build`)."""
