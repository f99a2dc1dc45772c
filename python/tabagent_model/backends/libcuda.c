/* The names that libggml-cuda takes from the driver's library. Only linked with, never loaded: at run
   time `libcuda.so.1` is the driver's own. */
#define NAME(name) \
    int name(void) { return 0; }
NAME(cuDeviceGet)
NAME(cuDeviceGetAttribute)
NAME(cuGetErrorString)
NAME(cuMemAddressFree)
NAME(cuMemAddressReserve)
NAME(cuMemCreate)
NAME(cuMemGetAllocationGranularity)
NAME(cuMemMap)
NAME(cuMemRelease)
NAME(cuMemSetAccess)
NAME(cuMemUnmap)
