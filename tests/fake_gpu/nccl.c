/* NCCL of the fake GPU: communicators send nothing. Each rank receives what it sent. */
#include "fake_gpu.h"

#include <nccl.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int size; /* number of ranks; 0 if unknown, in a communicator from ncclCommSplit */
} communicator;

static ncclResult_t make(ncclComm_t *made, int size) {
    communicator *fresh = malloc(sizeof *fresh);
    fresh->size = size;
    *made = (ncclComm_t)fresh;
    return ncclSuccess;
}

static size_t bytes_of(ncclDataType_t type) {
    static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* in the order of ncclDataType_t */
    if ((size_t)type >= sizeof bytes / sizeof *bytes) abort();
    return bytes[type];
}

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) { return "an error of the fake GPU's NCCL"; }
const char *ncclGetLastError(ncclComm_t communicator) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    memset(id, 7, sizeof *id);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *made, int size, ncclUniqueId id, int rank) {
    return make(made, size);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *made, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
    return ncclCommInitRank(made, size, id, rank);
}

ncclResult_t ncclCommInitRankScalable(
    ncclComm_t *made, int size, int rank, int num_ids, ncclUniqueId *ids, ncclConfig_t *config
) {
    return make(made, size);
}

ncclResult_t ncclCommSplit(ncclComm_t from, int color, int key, ncclComm_t *made, ncclConfig_t *config) {
    if (color == NCCL_SPLIT_NOCOLOR) *made = NULL;
    return color == NCCL_SPLIT_NOCOLOR ? ncclSuccess : make(made, 0);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

static ncclResult_t carry(const void *from, void *to, size_t count, ncclDataType_t type) {
    fake_gpu_add(FAKE_GPU_collectives);
    if (from != to) memmove(to, from, count * bytes_of(type));
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t communicator,
    cudaStream_t stream
) {
    return carry(from, to, count, type);
}

ncclResult_t ncclBroadcast(
    const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t communicator, cudaStream_t stream
) {
    return carry(from, to, count, type);
}

ncclResult_t ncclBcast(
    void *buffer, size_t count, ncclDataType_t type, int root, ncclComm_t communicator, cudaStream_t stream
) {
    return carry(buffer, buffer, count, type);
}

ncclResult_t ncclAllGather(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t handle, cudaStream_t stream
) {
    int size = ((communicator *)handle)->size;
    if (!size) return fake_gpu_unimplemented("ncclAllGather over a split communicator", ncclInternalError);
    for (int rank = 1; rank < size; rank++) memmove((char *)to + rank * count * bytes_of(type), from, count * bytes_of(type));
    return carry(from, to, count, type);
}
