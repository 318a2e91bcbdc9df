"""Images a second and core that the fractal generator renders. Run: python benchmarks/fractals.py"""

import time

import numpy as np

from nfnet_lib.fractals import FractalGenerator


def main() -> None:
    classes = np.arange(512) % 100
    for size in (32, 40, 48):
        generator = FractalGenerator(num_classes=100, image_size=size)
        began = time.process_time()
        generator.render(np.arange(100), np.zeros(100, np.int64))
        setup = time.process_time() - began
        rates = []
        for repeat in range(5):
            began = time.process_time()
            generator.render(classes, np.full(512, repeat))
            rates.append(512 / (time.process_time() - began))
        print(f"{size} px: {np.median(rates):6.0f} images/s/core (first 100 images, with their systems: {setup:.2f} s)")


if __name__ == "__main__":
    main()
