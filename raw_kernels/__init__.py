"""CUDA C++ sources. Each .cu compiles alone with nvcc and NVRTC; README.md says what each one is for."""
