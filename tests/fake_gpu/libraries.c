/* cuBLAS and cuDNN of the fake GPU: calls are counted, and return the values that torch reads.

   Of cuDNN only the v7 API is implemented: TORCH_CUDNN_V8_API_DISABLED=1 makes torch use it. */
#include "fake_gpu.h"

#include <cublasLt.h>
#include <cublas_api.h>
#include <cudnn.h>
#include <string.h>

/* ---- cuBLAS ---- */

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = fake_gpu_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = fake_gpu_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t compute, cudaDataType_t scale) {
    *made = fake_gpu_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t *made, cudaDataType type, uint64_t rows, uint64_t columns, int64_t stride
) {
    *made = fake_gpu_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
    *made = fake_gpu_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int asked,
    cublasLtMatmulHeuristicResult_t results[], int *found
) {
    memset(results, 0, sizeof *results);
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- cuDNN ---- */

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
cudnnStatus_t cudnnGetProperty(libraryPropertyType which, int *value) {
    const int version[] = {CUDNN_MAJOR, CUDNN_MINOR, CUDNN_PATCHLEVEL};
    *value = version[which];
    return CUDNN_STATUS_SUCCESS;
}
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(cudnnStatus_t status) { return status ? "an error of the fake GPU" : "success"; }

#define CREATE(name, type)                \
    cudnnStatus_t name(type *made) {      \
        *made = fake_gpu_handle();        \
        return CUDNN_STATUS_SUCCESS;      \
    }
CREATE(cudnnCreate, cudnnHandle_t)
CREATE(cudnnCreateTensorDescriptor, cudnnTensorDescriptor_t)
CREATE(cudnnCreateFilterDescriptor, cudnnFilterDescriptor_t)
CREATE(cudnnCreateConvolutionDescriptor, cudnnConvolutionDescriptor_t)
CREATE(cudnnCreateActivationDescriptor, cudnnActivationDescriptor_t)
CREATE(cudnnCreatePoolingDescriptor, cudnnPoolingDescriptor_t)

/* Each search finds one algorithm, which is deterministic and needs no workspace. */
#define FOUND(chosen)                             \
    memset(results, 0, sizeof *results);          \
    results->algo = chosen;                       \
    results->determinism = CUDNN_DETERMINISTIC;   \
    results->time = 1.0f;                         \
    *found = 1;                                   \
    return CUDNN_STATUS_SUCCESS

#define FORWARD CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM
#define BACKWARD_DATA CUDNN_CONVOLUTION_BWD_DATA_ALGO_1
#define BACKWARD_FILTER CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1

cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnFilterDescriptor_t w,
    const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t y, int asked, int *found,
    cudnnConvolutionFwdAlgoPerf_t *results
) {
    FOUND(FORWARD);
}

cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t dx, int asked, int *found,
    cudnnConvolutionBwdDataAlgoPerf_t *results
) {
    FOUND(BACKWARD_DATA);
}

cudnnStatus_t cudnnGetConvolutionBackwardFilterAlgorithm_v7(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnFilterDescriptor_t dw, int asked, int *found,
    cudnnConvolutionBwdFilterAlgoPerf_t *results
) {
    FOUND(BACKWARD_FILTER);
}

cudnnStatus_t cudnnFindConvolutionForwardAlgorithmEx(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const void *x_data, const cudnnFilterDescriptor_t w,
    const void *w_data, const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t y, void *y_data,
    int asked, int *found, cudnnConvolutionFwdAlgoPerf_t *results, void *workspace, size_t bytes
) {
    FOUND(FORWARD);
}

cudnnStatus_t cudnnFindConvolutionBackwardDataAlgorithmEx(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w, const void *w_data, const cudnnTensorDescriptor_t dy,
    const void *dy_data, const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t dx, void *dx_data,
    int asked, int *found, cudnnConvolutionBwdDataAlgoPerf_t *results, void *workspace, size_t bytes
) {
    FOUND(BACKWARD_DATA);
}

cudnnStatus_t cudnnFindConvolutionBackwardFilterAlgorithmEx(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const void *x_data, const cudnnTensorDescriptor_t dy,
    const void *dy_data, const cudnnConvolutionDescriptor_t convolution, const cudnnFilterDescriptor_t dw, void *dw_data,
    int asked, int *found, cudnnConvolutionBwdFilterAlgoPerf_t *results, void *workspace, size_t bytes
) {
    FOUND(BACKWARD_FILTER);
}

cudnnStatus_t cudnnGetConvolutionForwardWorkspaceSize(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnFilterDescriptor_t w,
    const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t y, cudnnConvolutionFwdAlgo_t algorithm,
    size_t *bytes
) {
    *bytes = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetConvolutionBackwardDataWorkspaceSize(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t dx,
    cudnnConvolutionBwdDataAlgo_t algorithm, size_t *bytes
) {
    *bytes = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetConvolutionBackwardFilterWorkspaceSize(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnFilterDescriptor_t dw,
    cudnnConvolutionBwdFilterAlgo_t algorithm, size_t *bytes
) {
    *bytes = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operations, const cudnnTensorDescriptor_t x,
    const cudnnTensorDescriptor_t z, const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t statistics,
    const cudnnActivationDescriptor_t activation, size_t *bytes
) {
    *bytes = 1024;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operations, const cudnnTensorDescriptor_t x,
    const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t dy, const cudnnTensorDescriptor_t dz,
    const cudnnTensorDescriptor_t dx, const cudnnTensorDescriptor_t statistics,
    const cudnnActivationDescriptor_t activation, size_t *bytes
) {
    *bytes = 1024;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operations,
    const cudnnActivationDescriptor_t activation, const cudnnTensorDescriptor_t x, size_t *bytes
) {
    *bytes = 1024;
    return CUDNN_STATUS_SUCCESS;
}
