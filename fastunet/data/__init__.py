"""Images and masks, from files to tensors."""

from fastunet.data.images import find_images as find_images
from fastunet.data.images import read_image as read_image
from fastunet.data.images import read_mask as read_mask
from fastunet.data.pairs import DataSummary as DataSummary
from fastunet.data.pairs import Pair as Pair
from fastunet.data.pairs import SegmentationDataset as SegmentationDataset
from fastunet.data.pairs import check_foreground as check_foreground
from fastunet.data.pairs import find_pairs as find_pairs
from fastunet.data.pairs import inspect as inspect
from fastunet.data.pairs import labels_from_mask as labels_from_mask
from fastunet.data.pairs import mask_from_labels as mask_from_labels
from fastunet.data.pairs import moments as moments
from fastunet.data.pairs import normalize as normalize
from fastunet.data.pairs import split as split
