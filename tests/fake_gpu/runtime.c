/* The CUDA runtime of the fake GPU: an H100 of compute capability 9.0 on which every call is synchronous. */
#define _GNU_SOURCE
#include "fake_gpu.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static __thread cudaError_t last_error;

/* ---- devices ---- */

static __thread int current_device;

cudaError_t cudaGetDeviceCount(int *count) {
    const char *asked = getenv("FAKE_GPUS");
    *count = asked ? atoi(asked) : 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    int count;
    cudaGetDeviceCount(&count);
    if (device < 0 || device >= count) return last_error = cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = "fake GPU (computes nothing)",
        .totalGlobalMem = FAKE_GPU_MEMORY_BYTES,
        .sharedMemPerBlock = 49152,
        .regsPerBlock = 65536,
        .warpSize = 32,
        .memPitch = 2147483647,
        .maxThreadsPerBlock = 1024,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .totalConstMem = 65536,
        .major = FAKE_GPU_ARCHITECTURE_MAJOR,
        .minor = FAKE_GPU_ARCHITECTURE_MINOR,
        .textureAlignment = 512,
        .multiProcessorCount = FAKE_GPU_MULTIPROCESSORS,
        .canMapHostMemory = 1,
        .concurrentKernels = 1,
        .unifiedAddressing = 1,
        .l2CacheSize = 52428800,
        .maxThreadsPerMultiProcessor = 2048,
        .sharedMemPerMultiprocessor = 233472,
        .regsPerMultiprocessor = 65536,
        .sharedMemPerBlockOptin = 232448,
        .maxBlocksPerMultiProcessor = 32,
        .cooperativeLaunch = 1,
        .streamPrioritiesSupported = 1,
        .memoryBusWidth = 5120,
        .asyncEngineCount = 3,
        .pciBusID = device + 1,
    };
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp properties;
    cudaGetDeviceProperties(&properties, device);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
        case cudaDevAttrMaxGridDimX: *value = properties.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: *value = properties.maxGridSize[1]; break;
        case cudaDevAttrMaxGridDimZ: *value = properties.maxGridSize[2]; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = properties.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = properties.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = properties.sharedMemPerMultiprocessor; break;
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = properties.regsPerMultiprocessor; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = properties.maxBlocksPerMultiProcessor; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = properties.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
        case cudaDevAttrWarpSize: *value = properties.warpSize; break;
        case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
        default: *value = 1; /* all other queries ask whether a feature exists */
    }
    return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **pointer, size_t bytes) { return fake_gpu_alloc(pointer, bytes, 1); }
cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return fake_gpu_alloc(pointer, bytes, 0); }

cudaError_t cudaFree(void *pointer) {
    if (pointer) fake_gpu_free(pointer);
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }
cudaError_t cudaFreeHost(void *pointer) { return cudaFree(pointer); }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
    memset(attributes, 0, sizeof *attributes);
    attributes->type = types[fake_gpu_on_device(pointer) + 1];
    attributes->devicePointer = attributes->hostPointer = (void *)pointer;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = FAKE_GPU_MEMORY_BYTES;
    *free_bytes = *total_bytes - fake_gpu_bytes(0);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = fake_gpu_handle();
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    fake_gpu_copy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    fake_gpu_add(FAKE_GPU_stream_waits);
    fake_gpu_copy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t s) {
    fake_gpu_copy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(
    void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind,
    cudaStream_t stream
) {
    if (height) fake_gpu_copy(to, from, width);
    for (size_t row = 1; row < height; row++) memmove((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *pointer, int value, size_t bytes) {
    fake_gpu_add(FAKE_GPU_memsets);
    memset(pointer, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
    return cudaMemset(pointer, value, bytes);
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char space[1 << 20];
    *address = space;
    return cudaSuccess;
}

/* ---- streams and events ---- */

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = fake_gpu_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int p) { return cudaStreamCreate(stream); }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *id) {
    *id = (uintptr_t)stream;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *num_dependencies
) {
    if (id) *id = 0;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    fake_gpu_add(FAKE_GPU_stream_waits);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) { return cudaStreamSynchronize(0); }

typedef struct {
    unsigned flags;
} event; /* target of a cudaEvent_t of this GPU */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *made, unsigned flags) {
    event *fresh = malloc(sizeof *fresh);
    fresh->flags = flags;
    *made = (cudaEvent_t)fresh;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *made) { return cudaEventCreateWithFlags(made, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t which) {
    free(which);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t which) {
    int blocking = ((event *)which)->flags & cudaEventBlockingSync;
    fake_gpu_add(blocking ? FAKE_GPU_event_waits : FAKE_GPU_spinning_waits);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = 1.0f;
    return cudaSuccess;
}

/* ---- kernels ---- */

void __cudaRegisterFunction(
    void **module, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e
) {
    fake_gpu_name_kernel(host, name);
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *module;
    return &module;
}

void __cudaRegisterFatBinaryEnd(void **module) {}
void __cudaUnregisterFatBinary(void **module) {}
void __cudaRegisterVar(void **module, char *host, char *device, const char *name, int a, size_t b, int c, int d) {}
char __cudaInitModule(void **module) { return 0; }

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configurations[16];
static __thread int depth;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    if (depth == 16) abort();
    configurations[depth].grid = grid;
    configurations[depth].block = block;
    configurations[depth].shared = shared;
    configurations[depth++].stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!depth) abort();
    depth--;
    *grid = configurations[depth].grid;
    *block = configurations[depth].block;
    *shared = configurations[depth].shared;
    *(void **)stream = configurations[depth].stream;
    return cudaSuccess;
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared) {
    fake_gpu_note_kernel(function);
    int right = grid.x && grid.y && grid.z && block.x && block.y && block.z && grid.x <= 2147483647u && grid.y <= 65535 &&
                grid.z <= 65535 && block.z <= 64 && (size_t)block.x * block.y * block.z <= 1024 && shared <= 232448;
    return right ? cudaSuccess : (last_error = cudaErrorInvalidConfiguration);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return launch(function, grid, block, shared);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared);
}

cudaError_t cudaLaunchCooperativeKernel(
    const void *function, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream
) {
    return launch(function, grid, block, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **args) {
    return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024,
        .numRegs = 32,
        .ptxVersion = 90,
        .binaryVersion = 90,
        .maxDynamicSharedSizeBytes = 49152,
    };
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int threads, size_t shared, unsigned flags
) {
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}

/* ---- errors and driver entry points ---- */

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorName(cudaError_t error) { return error ? "an error of the fake GPU" : "cudaSuccess"; }

const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[64];
    if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
    snprintf(text, sizeof text, "error %d of the fake GPU", (int)error);
    return error ? text : "no error";
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *status
) {
    static const char *const suffixes[] = {"", "_v2", "_v3"}; /* of functions whose signatures have changed */
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    char symbol[128];
    *function = NULL;
    for (int index = 0; driver && !*function && index < 3; index++) {
        snprintf(symbol, sizeof symbol, "%s%s", name, suffixes[index]);
        *function = dlsym(driver, symbol);
    }
    if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    if (!*function) return fake_gpu_unimplemented(name, cudaErrorNotSupported);
    return cudaSuccess;
}
