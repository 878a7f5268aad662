"""AdaHessian (Yao et al. 2021) for PyTorch with fused C++/CUDA and Triton kernels."""
