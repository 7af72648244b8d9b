/* Memory, counters and handles of the fake GPU: device memory is host memory, copies are synchronous, kernels are counted. */
#define _GNU_SOURCE
#include "fake_gpu.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- counters ---- */

static long counters[FAKE_GPU_NUM_COUNTERS];
#define COUNTER_NAME(name) #name,
static const char *const counter_names[] = {FAKE_GPU_COUNTERS(COUNTER_NAME)};

void fake_gpu_add(fake_gpu_counter which) { __sync_fetch_and_add(&counters[which], 1); }

long fake_gpu_count(const char *name) {
    for (int which = 0; which < FAKE_GPU_NUM_COUNTERS; which++)
        if (!strcmp(name, counter_names[which])) return counters[which];
    return -1;
}

int fake_gpu_unimplemented(const char *function, int error) {
    fprintf(stderr, "fake GPU: %s is not implemented. Fix: add it to tests/fake_gpu\n", function);
    return error;
}

void *fake_gpu_handle(void) {
    static long next = 1;
    return (void *)(0x100000 + 16 * __sync_fetch_and_add(&next, 1)); /* an address that faults when dereferenced */
}

/* ---- kernels, by the address of their host function ---- */

typedef struct {
    const void *function;
    char *name;
    long count;
} kernel;

#define SLOTS (1u << 20) /* torch registers about 100,000 */
static kernel *kernels;

static kernel *kernel_of(const void *function) {
    if (!kernels) kernels = calloc(SLOTS, sizeof *kernels);
    size_t slot = ((uintptr_t)function >> 4) * 2654435761u % SLOTS;
    while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) % SLOTS;
    return &kernels[slot];
}

void fake_gpu_name_kernel(const void *function, const char *name) {
    pthread_mutex_lock(&lock);
    kernel *found = kernel_of(function);
    found->function = function;
    if (!found->name) found->name = strdup(name);
    pthread_mutex_unlock(&lock);
}

void fake_gpu_note_kernel(const void *function) {
    fake_gpu_add(FAKE_GPU_kernels);
    pthread_mutex_lock(&lock);
    kernel *found = kernel_of(function);
    if (found->function) found->count++;
    pthread_mutex_unlock(&lock);
}

void fake_gpu_write_kernels(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return;
    for (size_t slot = 0; kernels && slot < SLOTS; slot++)
        if (kernels[slot].count) fprintf(file, "%ld\t%s\n", kernels[slot].count, kernels[slot].name);
    fclose(file);
}

/* ---- allocations ---- */

typedef struct {
    char *start;
    size_t bytes;
    int on_device;
} allocation;

static allocation *allocations;
static size_t num_allocations, capacity, device_bytes, peak_bytes;

/* FAKE_GPU_BYTES: the device's memory. Without it there is no limit. */
static size_t limit_bytes(void) {
    const char *asked = getenv("FAKE_GPU_BYTES");
    return asked ? strtoull(asked, NULL, 10) : SIZE_MAX;
}

int fake_gpu_alloc(void **pointer, size_t bytes, int on_device) {
    size_t mapped = bytes ? (bytes + 4095) / 4096 * 4096 : 4096;
    if (on_device && (mapped > limit_bytes() || device_bytes > limit_bytes() - mapped)) return 2;
    void *start = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return 2;
    pthread_mutex_lock(&lock);
    if (num_allocations == capacity) {
        capacity = capacity ? 2 * capacity : 1024;
        allocations = realloc(allocations, capacity * sizeof *allocations);
    }
    allocations[num_allocations++] = (allocation){start, mapped, on_device};
    if (on_device) device_bytes += mapped;
    if (device_bytes > peak_bytes) peak_bytes = device_bytes;
    pthread_mutex_unlock(&lock);
    *pointer = start;
    return 0;
}

static allocation *find(const void *pointer) {
    for (size_t index = num_allocations; index-- > 0;) {
        allocation *found = &allocations[index];
        if ((const char *)pointer >= found->start && (const char *)pointer < found->start + found->bytes) return found;
    }
    return NULL;
}

void fake_gpu_free(void *pointer) {
    pthread_mutex_lock(&lock);
    allocation *found = find(pointer);
    if (found && found->start == pointer) {
        if (found->on_device) device_bytes -= found->bytes;
        munmap(found->start, found->bytes);
        *found = allocations[--num_allocations];
    }
    pthread_mutex_unlock(&lock);
}

int fake_gpu_on_device(const void *pointer) {
    pthread_mutex_lock(&lock);
    allocation *found = find(pointer);
    int kind = found ? found->on_device : -1;
    pthread_mutex_unlock(&lock);
    return kind;
}

int fake_gpu_range(const void *pointer, void **start, size_t *bytes) {
    pthread_mutex_lock(&lock);
    allocation *found = find(pointer);
    if (found && start) *start = found->start;
    if (found && bytes) *bytes = found->bytes;
    pthread_mutex_unlock(&lock);
    return found != NULL;
}

void fake_gpu_copy(void *to, const void *from, size_t bytes) {
    int to_kind = fake_gpu_on_device(to), from_kind = fake_gpu_on_device(from);
    if (to_kind == 1 && from_kind == 1) fake_gpu_add(FAKE_GPU_copies_on_device);
    else if (to_kind == 1) fake_gpu_add(FAKE_GPU_copies_to_device);
    else if (from_kind == 1) fake_gpu_add(FAKE_GPU_copies_to_host);
    if ((to_kind == 1) != (from_kind == 1) && (to_kind == -1 || from_kind == -1)) fake_gpu_add(FAKE_GPU_pageable_copies);
    memmove(to, from, bytes);
}

long fake_gpu_bytes(int peak) { return peak ? peak_bytes : device_bytes; }

void fake_gpu_reset(void) {
    pthread_mutex_lock(&lock);
    memset(counters, 0, sizeof counters);
    for (size_t slot = 0; kernels && slot < SLOTS; slot++) kernels[slot].count = 0;
    peak_bytes = device_bytes;
    pthread_mutex_unlock(&lock);
}
