/* Calls that the fake GPU only counts, and calls that succeed without any work. No CUDA header is included here, so that
   argument lists need not be repeated: in the C calling convention the caller cleans up the arguments. */
#include "fake_gpu.h"

#define COUNTED(counter, name)               \
    int name(void) {                         \
        fake_gpu_add(FAKE_GPU_##counter);    \
        return 0;                            \
    }
COUNTED(matrix_products, cublasSgemm_v2)
COUNTED(matrix_products, cublasDgemm_v2)
COUNTED(matrix_products, cublasGemmEx)
COUNTED(matrix_products, cublasSgemmEx)
COUNTED(matrix_products, cublasSgemmStridedBatched)
COUNTED(matrix_products, cublasDgemmStridedBatched)
COUNTED(matrix_products, cublasGemmStridedBatchedEx)
COUNTED(matrix_products, cublasSgemv_v2)
COUNTED(matrix_products, cublasDgemv_v2)
COUNTED(matrix_products, cublasLtMatmul)
COUNTED(convolutions, cudnnConvolutionForward)
COUNTED(convolutions, cudnnConvolutionBackwardData)
COUNTED(convolutions, cudnnConvolutionBackwardFilter)
COUNTED(batch_norms, cudnnBatchNormalizationForwardTrainingEx)
COUNTED(batch_norms, cudnnBatchNormalizationBackwardEx)
COUNTED(batch_norms, cudnnBatchNormalizationForwardInference)

#define SUCCEEDS(name) \
    int name(void) { return 0; }
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cudnnDestroyActivationDescriptor)
SUCCEEDS(cudnnDestroyConvolutionDescriptor)
SUCCEEDS(cudnnDestroyFilterDescriptor)
SUCCEEDS(cudnnDestroyTensorDescriptor)
SUCCEEDS(cudnnSetConvolutionGroupCount)
SUCCEEDS(cudnnSetConvolutionMathType)
SUCCEEDS(cudnnSetConvolutionNdDescriptor)
SUCCEEDS(cudnnSetFilterNdDescriptor)
SUCCEEDS(cudnnSetStream)
SUCCEEDS(cudnnSetTensorNdDescriptor)
SUCCEEDS(ncclCommAbort)
SUCCEEDS(ncclCommDestroy)
SUCCEEDS(ncclCommFinalize)
SUCCEEDS(ncclGroupEnd)
SUCCEEDS(ncclGroupStart)
