/* Declarations shared by the parts of a GPU that computes nothing. See tests/fake_gpu/README.md. */
#ifndef FAKE_GPU_H
#define FAKE_GPU_H
#include <stddef.h>

/* The counters. Each entry is a counter and its name for fake_gpu_count. */
#define FAKE_GPU_COUNTERS(X)                                                                                       \
    X(kernels)           /* kernels launched by torch, Triton and the like */                                     \
    X(convolutions)      /* calls of cuDNN's convolutions */                                                       \
    X(batch_norms)       /* calls of cuDNN's batch norm */                                                         \
    X(matrix_products)   /* calls of cuBLAS */                                                                     \
    X(collectives)       /* calls of NCCL */                                                                       \
    X(copies_to_device)  /* from the host */                                                                       \
    X(copies_to_host)    /* from the device */                                                                     \
    X(copies_on_device)                                                                                            \
    X(pageable_copies)   /* copies from or to host memory that is not pinned; each waits                        */ \
    X(memsets)                                                                                                     \
    X(stream_waits)      /* the host waits for a stream or for the device */                                       \
    X(event_waits)       /* the host waits for an event and sleeps (cudaEventBlockingSync) */                      \
    X(spinning_waits)    /* the host waits for an event and spins */                                               \
    X(graph_launches)

#define FAKE_GPU_ENUM(name) FAKE_GPU_##name,
typedef enum { FAKE_GPU_COUNTERS(FAKE_GPU_ENUM) FAKE_GPU_NUM_COUNTERS } fake_gpu_counter;

#pragma GCC visibility push(default)
void fake_gpu_add(fake_gpu_counter which);
long fake_gpu_count(const char *name); /* -1 for an unknown name */
void fake_gpu_reset(void);
void fake_gpu_write_kernels(const char *path); /* a line "COUNT<tab>NAME" for each kernel since the reset */
void *fake_gpu_handle(void);                   /* a new opaque handle, never NULL */
void fake_gpu_note_kernel(const void *function);
void fake_gpu_name_kernel(const void *function, const char *name);
int fake_gpu_alloc(void **pointer, size_t bytes, int on_device); /* 0, or 2 (out of memory) in every API's numbering */
void fake_gpu_free(void *pointer);
int fake_gpu_on_device(const void *pointer); /* 1 device, 0 pinned host, -1 pageable host */
int fake_gpu_range(const void *pointer, void **start, size_t *bytes); /* 1 if the pointer lies in an allocation */
void fake_gpu_copy(void *to, const void *from, size_t bytes);
long fake_gpu_bytes(int peak);
int fake_gpu_unimplemented(const char *function, int error); /* prints the name, returns the error */
#pragma GCC visibility pop

#define FAKE_GPU_ARCHITECTURE_MAJOR 9
#define FAKE_GPU_ARCHITECTURE_MINOR 0
#define FAKE_GPU_MEMORY_BYTES (80ull << 30)
#define FAKE_GPU_MULTIPROCESSORS 132
#endif
