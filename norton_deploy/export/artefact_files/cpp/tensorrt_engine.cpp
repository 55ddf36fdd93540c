#include "engine.h"

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "contract.h"

namespace {

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

class Log : public nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << message << "\n";
    }
};

class TensorRtEngine : public Engine {
public:
    explicit TensorRtEngine(const std::string& path) {
        std::ifstream file(path, std::ios::binary);
        const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
        if (plan.empty()) throw std::runtime_error(path + ": cannot be read");
        runtime_.reset(nvinfer1::createInferRuntime(log_));
        if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (engine_) context_.reset(engine_->createExecutionContext());
        if (!context_) throw std::runtime_error(path + ": this TensorRT, or this GPU, cannot load the engine");
        check(cudaStreamCreate(&stream_));
        bind(contract::INPUT_NAME, contract::INPUT_BYTES);
        for (const auto& output : contract::OUTPUTS) bind(output.name, output.bytes);
    }

    ~TensorRtEngine() override {
        for (const auto& [name, memory] : memory_) cudaFree(memory);
        cudaStreamDestroy(stream_);
    }

    Outputs run(const void* input) override {
        check(cudaMemcpyAsync(memory_.at(contract::INPUT_NAME), input, contract::INPUT_BYTES,
                              cudaMemcpyHostToDevice, stream_));
        if (!context_->enqueueV3(stream_)) throw std::runtime_error("TensorRT could not run the engine");
        Outputs found;
        for (const auto& output : contract::OUTPUTS) {
            auto& values = found[output.name];
            values.resize(output.bytes);
            check(cudaMemcpyAsync(values.data(), memory_.at(output.name), output.bytes, cudaMemcpyDeviceToHost,
                                  stream_));
        }
        check(cudaStreamSynchronize(stream_));
        return found;
    }

private:
    void bind(const char* name, std::size_t bytes) {
        check(cudaMalloc(&memory_[name], bytes));
        if (!context_->setTensorAddress(name, memory_[name]))
            throw std::runtime_error(std::string("the engine has no tensor ") + name);
    }

    Log log_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::map<std::string, void*> memory_;
    cudaStream_t stream_ = nullptr;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const std::string& path) { return std::make_unique<TensorRtEngine>(path); }
