"""A stand-in of the part of picamera2's interface that ``ensembler.sources`` uses; it records the calls.

The real picamera2 needs libcamera and a Raspberry Pi and was not run here. Frames are as its manual has them: with the
format "BGR888" each pixel of an array is [R, G, B]. What a test in another process wants to know is in the file that
``FAKE_CAMERA_LOG`` names.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

CAMERAS = [{"Model": "imx219", "Num": 0}]
RED = (200, 30, 10)  # red, green, blue
calls = []


def record(*call):
    calls.append(call)
    if log := os.environ.get("FAKE_CAMERA_LOG"):
        with Path(log).open("a") as stream:
            print(*call, file=stream)


class Picamera2:
    fails = ()  # names of methods that raise

    def __init__(self):
        record("open")
        self.check("open")

    @staticmethod
    def global_camera_info():
        return CAMERAS

    def check(self, name):
        if name in self.fails:
            raise RuntimeError(f"{name} failed")

    def create_video_configuration(self, main):
        return {"main": main}

    def configure(self, config):
        record("configure", config["main"]["format"], *config["main"]["size"])
        self.size = config["main"]["size"]
        self.check("configure")

    def start(self):
        record("start")
        self.check("start")

    def capture_array(self, name):
        assert name == "main"
        self.check("capture_array")
        width, height = self.size
        return np.broadcast_to(np.uint8(RED), (height, width, 3)).copy()

    def close(self):
        record("close")
