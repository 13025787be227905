// Launches Triton kernels whose machine code (cubin) is part of this library. Called from Python through ctypes by
// metis_kernels/aot/library.py.
//
// The CUDA driver is opened at the first launch and never linked: the library builds, loads and lists its variants on a
// machine without a GPU. A variant is one kernel with one specialisation for one architecture; variants.h, which
// metis_kernels.aot.build writes, has the table of them.

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

// What Python sees: library.py mirrors it.
struct variant {
  const char *key;     // hash of source, specialisation, options and architecture: metis_kernels.aot.variant
  const char *kernel;  // module and name, for people
  const char *symbol;  // of the kernel in the cubin
  const unsigned char *cubin;
  uint32_t cubin_bytes;
  int32_t arch;         // compute capability times ten
  int32_t num_threads;  // of a block
  int32_t shared_bytes; // dynamic shared memory of a block
  int32_t num_params;   // the two scratch pointers included
};

#include "variants.h"

enum { NUM_VARIANTS = sizeof VARIANTS / sizeof *VARIANTS };

// The part of cuda.h that is used here; that header comes with the CUDA toolkit, which nothing else here needs.
typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
enum {
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_FUNC_CACHE_PREFER_SHARED = 1,
};

// Dynamic shared memory that every kernel gets without asking, bytes.
enum { SHARED_WITHOUT_ASKING = 48 * 1024 };

// aot/build.py refuses kernels with more.
enum { MAX_PARAMS = 64 };

static struct {
  CUresult (*cuGetErrorString)(CUresult, const char **);
  CUresult (*cuDeviceGet)(CUdevice *, int);
  CUresult (*cuDevicePrimaryCtxRetain)(CUcontext *, CUdevice);
  CUresult (*cuCtxGetCurrent)(CUcontext *);
  CUresult (*cuCtxSetCurrent)(CUcontext);
  CUresult (*cuModuleLoadData)(CUmodule *, const void *);
  CUresult (*cuModuleGetFunction)(CUfunction *, CUmodule, const char *);
  CUresult (*cuFuncSetCacheConfig)(CUfunction, int);
  CUresult (*cuFuncSetAttribute)(CUfunction, int, int);
  CUresult (*cuLaunchKernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                             void **, void **);
} driver;

// A variant's function in one CUDA context. Contexts are never destroyed while PyTorch runs (it uses the primary ones), so
// neither are these.
struct loaded {
  CUcontext context;
  CUfunction function;
  struct loaded *next;
};

static struct loaded *loaded[NUM_VARIANTS];
static int driver_is_open;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // of the three above

static _Thread_local char error_text[512];

static int fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return -1;
}

static int driver_failed(const char *call, CUresult result, const struct variant *variant) {
  const char *text = NULL;
  if (driver.cuGetErrorString(result, &text) || !text) text = "unknown error";
  return fail("%s for %s (sm_%d): %s (CUDA error %d)", call, variant->kernel, variant->arch, text, result);
}

// Call the driver, and return from the calling function if it reports an error.
#define TRY(call, ...)                                                       \
  do {                                                                       \
    CUresult result_ = driver.call(__VA_ARGS__);                             \
    if (result_) return driver_failed(#call, result_, variant);              \
  } while (0)

static int open_driver(void) {
  if (driver_is_open) return 0;
  void *handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle)
    return fail("the NVIDIA driver's libcuda.so.1 cannot be opened: %s. It comes with the GPU driver; in a container, the "
                "runtime has to pass it through",
                dlerror());
  const struct {
    const char *name;
    void **function;
  } wanted[] = {
#define WANT(name) {#name, (void **)&driver.name}
      WANT(cuGetErrorString),    WANT(cuDeviceGet),          WANT(cuDevicePrimaryCtxRetain), WANT(cuCtxGetCurrent),
      WANT(cuCtxSetCurrent),     WANT(cuModuleLoadData),     WANT(cuModuleGetFunction),      WANT(cuFuncSetCacheConfig),
      WANT(cuFuncSetAttribute),  WANT(cuLaunchKernel),
#undef WANT
  };
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
    if (!(*wanted[i].function = dlsym(handle, wanted[i].name)))
      return fail("libcuda.so.1 has no %s: the NVIDIA driver is too old", wanted[i].name);
  driver_is_open = 1;
  return 0;
}

// The context of this thread; as Triton's launcher does, the device's primary one where none is current yet.
static int current_context(const struct variant *variant, int device, CUcontext *context) {
  TRY(cuCtxGetCurrent, context);
  if (*context) return 0;
  CUdevice handle;
  TRY(cuDeviceGet, &handle, device);
  TRY(cuDevicePrimaryCtxRetain, context, handle);
  TRY(cuCtxSetCurrent, *context);
  return 0;
}

// The variant's function in this thread's context, loaded at its first launch there.
static int function_of(const struct variant *variant, int device, CUfunction *function) {
  CUcontext context;
  if (open_driver() || current_context(variant, device, &context)) return -1;
  struct loaded **first = &loaded[variant - VARIANTS];
  for (struct loaded *one = *first; one; one = one->next)
    if (one->context == context) {
      *function = one->function;
      return 0;
    }
  CUmodule module;
  TRY(cuModuleLoadData, &module, variant->cubin);
  TRY(cuModuleGetFunction, function, module, variant->symbol);
  if (variant->shared_bytes > SHARED_WITHOUT_ASKING) {
    TRY(cuFuncSetCacheConfig, *function, CU_FUNC_CACHE_PREFER_SHARED);
    TRY(cuFuncSetAttribute, *function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, variant->shared_bytes);
  }
  struct loaded *one = malloc(sizeof *one);
  if (!one) return fail("out of memory");
  *one = (struct loaded){context, *function, *first};
  *first = one;
  return 0;
}

// The table; its length goes to *num_variants.
EXPORT const struct variant *metis_aot_variants(int32_t *num_variants) {
  *num_variants = NUM_VARIANTS;
  return VARIANTS;
}

// Why the last launch of this thread failed.
EXPORT const char *metis_aot_error(void) { return error_text; }

// Launch a variant on a grid of blocks. slots: one of 8 bytes for each parameter of the kernel, little-endian, the scratch
// pointers included. device: ordinal, used where the thread has no CUDA context. Returns 0, or -1 and metis_aot_error().
EXPORT int metis_aot_launch(int32_t index, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, int32_t device, void *stream,
                            const unsigned char *slots) {
  if (index < 0 || index >= NUM_VARIANTS) return fail("there is no variant %d: the library has %d", index, (int)NUM_VARIANTS);
  const struct variant *variant = &VARIANTS[index];
  CUfunction function;
  pthread_mutex_lock(&lock);
  int failed = function_of(variant, device, &function);
  pthread_mutex_unlock(&lock);
  if (failed) return -1;
  void *params[MAX_PARAMS];
  for (int i = 0; i < variant->num_params; i++) params[i] = (void *)(slots + 8 * i);
  TRY(cuLaunchKernel, function, grid_x, grid_y, grid_z, variant->num_threads, 1, 1, variant->shared_bytes, stream, params,
      NULL);
  return 0;
}
