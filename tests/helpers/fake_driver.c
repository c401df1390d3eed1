/* A CUDA driver without a GPU: it takes what Triton's launcher hands to a driver, refuses what the real one would, and
 * runs nothing. The rules are those of CUDA's documentation of cuTensorMapEncodeTiled and cuLaunchKernelEx.
 */
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* What its user reads: how much was taken, and why the last thing was not. */
unsigned long launches, tensor_maps;
char refusal[256];

static int capability = 90, shared_limit = 232448, opted_in = 49152, context;

void configure(int of_capability, int of_shared_memory) {
  capability = of_capability;
  shared_limit = of_shared_memory;
}

#define REFUSE_IF(condition)                                                                                           \
  do {                                                                                                                 \
    if (condition) {                                                                                                   \
      snprintf(refusal, sizeof refusal, "%s: %s", __func__, #condition);                                               \
      return CUDA_ERROR_INVALID_VALUE;                                                                                 \
    }                                                                                                                  \
  } while (0)

static unsigned element_size(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8:
    return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    return 2;
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    return 4;
  default:
    return 0;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  (void)fill;
  (void)promotion;
  REFUSE_IF(capability < 90);
  REFUSE_IF((uintptr_t)map % 64 != 0);
  REFUSE_IF(rank < 1 || rank > 5);
  REFUSE_IF((uintptr_t)address % 16 != 0);
  REFUSE_IF(element_size(type) == 0);
  REFUSE_IF(interleave != CU_TENSOR_MAP_INTERLEAVE_NONE);
  for (unsigned i = 0; i < rank; i++) {
    REFUSE_IF(sizes[i] < 1 || sizes[i] > 1ull << 32);
    REFUSE_IF(box[i] < 1 || box[i] > 256);
    REFUSE_IF(element_strides[i] < 1 || element_strides[i] > 8);
  }
  for (unsigned i = 0; i + 1 < rank; i++) /* The innermost has none: its elements are neighbours. */
    REFUSE_IF(strides[i] % 16 != 0 || strides[i] >= 1ull << 40);
  REFUSE_IF(box[0] * element_size(type) % 16 != 0);
  /* What is swizzled has rows of 32, 64 or 128 bytes at most, by the numbers 1, 2 and 3. */
  REFUSE_IF(swizzle > CU_TENSOR_MAP_SWIZZLE_128B);
  REFUSE_IF(swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && box[0] * element_size(type) > (16u << swizzle));
  memset(map, 0, sizeof *map);
  tensor_maps++;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  (void)extra;
  REFUSE_IF(function == NULL || parameters == NULL);
  REFUSE_IF(config->gridDimX < 1 || config->gridDimX > 2147483647u);
  REFUSE_IF(config->gridDimY < 1 || config->gridDimY > 65535 || config->gridDimZ < 1 || config->gridDimZ > 65535);
  REFUSE_IF(config->blockDimX < 32 || config->blockDimX > 1024 || config->blockDimX % 32 != 0);
  REFUSE_IF(config->blockDimY != 1 || config->blockDimZ != 1);
  REFUSE_IF(config->sharedMemBytes > (unsigned)opted_in);
  launches++;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = capability / 10;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = capability % 10;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = shared_limit;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = shared_limit + 1024;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  default: /* Clocks, bus widths, multiprocessors: nothing here depends on them. */
    *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    REFUSE_IF(value > shared_limit);
    opted_in = value;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  REFUSE_IF(memcmp(image, "\177ELF", 4) != 0);
  *module = (CUmodule)&context;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  REFUSE_IF(module == NULL || name[0] == 0);
  *function = (CUfunction)&context;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  REFUSE_IF(attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER);
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : refusal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
  (void)device;
  return cuCtxGetCurrent(retained);
}

CUresult cuCtxSetCurrent(CUcontext chosen) {
  (void)chosen;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache preference) {
  (void)function, (void)preference;
  return CUDA_SUCCESS;
}

/* Named by the launcher for what no kernel here does: to print. */
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  (void)value, (void)limit;
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit, (void)value;
  return CUDA_ERROR_NOT_SUPPORTED;
}
