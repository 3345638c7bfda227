"""Co-DETR (arXiv 2211.12860): Deformable DETR trained with collaborative hybrid
assignment. Plain PyTorch and torchvision.
"""
