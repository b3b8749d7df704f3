# SPDX-License-Identifier: Apache-2.0
"""
The benchmarks' metrics as exact accumulators that merge.

``pixel`` (AP, FPR95, AUROC, F1), ``components`` (sIoU, PPV, F1), ``segmentation`` (mIoU),
``calibration`` (ECE, KS, PRR, misclassification, image level) hold the canonical figures;
``compat`` what the field's own scripts print; ``stored`` runs all of them over a source of score
maps, on one or many processes. docs/metrics.md defines each figure.
"""
