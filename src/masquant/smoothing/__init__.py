# SPDX-License-Identifier: Apache-2.0
"""Smoothing vectors per modality: in closed form and learned."""
