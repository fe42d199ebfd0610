"""Examples on their way to the training: batches, what they are read from, and real data that is on every machine."""

from disttrain.data.batches import Batches
from disttrain.data.images import ImageFolder
from disttrain.data.source import Source
from disttrain.data.tables import Table
from disttrain.data.tfrecords import TFRecords

__all__ = ["Batches", "ImageFolder", "Source", "TFRecords", "Table"]
