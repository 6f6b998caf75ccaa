# SPDX-License-Identifier: Apache-2.0
"""Calibration: samples, what the decoder blocks see of them, and statistics per modality."""
