# SPDX-License-Identifier: Apache-2.0
"""Benchmark data sets, one adapter each."""
